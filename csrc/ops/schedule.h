// SPDX-License-Identifier: Apache-2.0
// The order in which blocks of the pair matrix are computed, and by which thread.
//
// A block (I, J) updates the results of rows I and of columns J, which in a self-batch are rows
// too. Tasks are listed in rounds in which no block of rows occurs twice (I + J = r modulo the
// number of blocks), threads take them in that order, and each task waits for its turn at both of
// its blocks. So there are no locks around results, no atomics on them and no private copies, every
// row receives its updates in the listed order whatever the number of threads, and a thread that
// the system has set aside delays only the tasks that need its block.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <thread>
#include <vector>

namespace flashmetric {

// Splits n rows into blocks of whole panels. Depends on sizes only, never on the thread count.
class Blocks {
 public:
  Blocks(int64_t n, int64_t panel_width, int64_t max_rows)
      : n_(n), width_(panel_width), panels_((n + panel_width - 1) / panel_width) {
    const int64_t per_block = std::max<int64_t>(max_rows / panel_width, 1);
    count_ = (panels_ + per_block - 1) / per_block;
    // Enough blocks for a few threads even where few large ones would do.
    count_ = std::max(count_, std::min<int64_t>(panels_, 8));
  }
  int64_t count() const { return count_; }
  int64_t begin(int64_t b) const { return panels_ * b / count_ * width_; }
  int64_t end(int64_t b) const { return std::min(panels_ * (b + 1) / count_ * width_, n_); }

 private:
  int64_t n_, width_, panels_, count_;
};

// Below this many multiply-adds starting threads costs more than it saves.
constexpr int64_t kParallelWork = int64_t{1} << 24;

// Calls f(0) ... f(count - 1), which must be independent of each other.
template <class F>
void for_each(int64_t count, bool parallel, const F& f) {
  if (!parallel) {
    for (int64_t t = 0; t < count; ++t) f(t);
    return;
  }
  torch::stable::parallel_for(0, count, 1, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) f(t);
  });
}

class Schedule {
 public:
  // Every I <= J of one self-batch.
  static Schedule symmetric(int64_t blocks) {
    Schedule s(blocks, 0);
    for (int64_t round = 0; round < blocks; ++round)
      for (int64_t i = 0; i < blocks; ++i) {
        const int64_t j = (round - i + blocks) % blocks;
        if (i <= j) s.add(i, j, i, j);
      }
    return s;
  }

  // Every block of queries I with every block of references J.
  static Schedule rectangular(int64_t row_blocks, int64_t col_blocks) {
    Schedule s(row_blocks, col_blocks);
    const int64_t rounds = std::max(row_blocks, col_blocks);
    for (int64_t round = 0; round < rounds; ++round)
      for (int64_t i = 0; i < row_blocks; ++i) {
        const int64_t j = (round - i + rounds) % rounds;
        if (j < col_blocks) s.add(i, j, i, row_blocks + j);
      }
    return s;
  }

  // Calls f(I, J) for every task, in turn at both of its blocks.
  template <class F>
  void run(bool parallel, const F& f) const {
    if (!parallel) {
      for (const Task& task : tasks_) f(task.i, task.j);
      return;
    }
    std::vector<std::atomic<int64_t>> turn(turns_.size());
    std::atomic<size_t> next{0};
    std::atomic<bool> failed{false};
    const auto work = [&] {
      for (size_t t; (t = next.fetch_add(1)) < tasks_.size();) {
        const Task& task = tasks_[t];
        // Earlier tasks are finished or running, so this ends.
        await(turn[task.slot_i], task.turn_i, failed);
        await(turn[task.slot_j], task.turn_j, failed);
        if (failed) return;
        try {
          f(task.i, task.j);
        } catch (...) {
          failed = true;
          throw;
        }
        turn[task.slot_i].fetch_add(1, std::memory_order_release);
        if (task.slot_j != task.slot_i) turn[task.slot_j].fetch_add(1, std::memory_order_release);
      }
    };
    torch::stable::parallel_for(0, torch::stable::get_num_threads(), 1,
                                [&](int64_t begin, int64_t end) {
                                  for (int64_t t = begin; t < end; ++t) work();
                                });
  }

 private:
  struct Task {
    int64_t i, j;
    size_t slot_i, slot_j;  // whose turn to wait for
    int64_t turn_i, turn_j;
  };

  Schedule(int64_t row_blocks, int64_t col_blocks)
      : turns_(static_cast<size_t>(row_blocks + col_blocks), 0) {}

  void add(int64_t i, int64_t j, int64_t slot_i, int64_t slot_j) {
    const size_t a = static_cast<size_t>(slot_i), b = static_cast<size_t>(slot_j);
    tasks_.push_back({i, j, a, b, turns_[a], turns_[b]});
    ++turns_[a];
    if (a != b) ++turns_[b];
  }

  static void await(const std::atomic<int64_t>& turn, int64_t wanted,
                    const std::atomic<bool>& failed) {
    while (turn.load(std::memory_order_acquire) != wanted && !failed) std::this_thread::yield();
  }

  std::vector<int64_t> turns_;
  std::vector<Task> tasks_;
};

}  // namespace flashmetric
