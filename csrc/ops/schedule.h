// SPDX-License-Identifier: Apache-2.0
// The order in which blocks of the pair matrix are computed, and by which thread.
//
// A block (I, J) updates the results of rows I and of columns J, which in a self-batch are rows
// too. Tasks come in rounds in which no block of rows occurs twice (I + J = r modulo the number of
// blocks), threads take them in that order, and each task waits for its turn at both of its blocks.
// So there are no locks around results, no atomics on them and no private copies, every row
// receives its updates in the order of the rounds whatever the number of threads, and a thread that
// the system has set aside delays only the tasks that need its block. Tasks are computed from their
// numbers: a list of them would grow with the square of the rows.
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
  static Schedule symmetric(int64_t blocks) { return {blocks, blocks, true}; }

  // Every block of queries I with every block of references J.
  static Schedule rectangular(int64_t row_blocks, int64_t col_blocks) {
    return {row_blocks, col_blocks, false};
  }

  // Calls f(I, J) for every task, in turn at both of its blocks.
  template <class F>
  void run(bool parallel, const F& f) const {
    const int64_t tasks = count();
    if (!parallel) {
      for (int64_t t = 0; t < tasks; ++t) {
        const Task task = at(t);
        f(task.i, task.j);
      }
      return;
    }
    std::vector<std::atomic<int64_t>> turn(static_cast<size_t>(symmetric_ ? rows_ : rows_ + cols_));
    std::atomic<int64_t> next{0};
    std::atomic<bool> failed{false};
    const auto work = [&] {
      for (int64_t t; (t = next.fetch_add(1)) < tasks;) {
        const Task task = at(t);
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

  Schedule(int64_t rows, int64_t cols, bool symmetric)
      : rows_(rows),
        cols_(cols),
        rounds_(std::max(rows, cols)),
        few_(std::min(rows, cols)),
        symmetric_(symmetric) {}

  int64_t count() const { return symmetric_ ? rows_ * (rows_ + 1) / 2 : rows_ * cols_; }

  Task at(int64_t t) const { return symmetric_ ? symmetric_task(t) : rectangular_task(t); }

  // Two rounds, the first of an even number, have a task more than there are blocks. In round r the
  // I <= J are those up to r / 2 and, from r + 1 on, those whose J is a number of blocks further.
  // Every block has one task a round.
  Task symmetric_task(int64_t t) const {
    const int64_t first = rows_ / 2 + 1, of_two = t % (rows_ + 1);
    const int64_t round = t / (rows_ + 1) * 2 + (of_two >= first ? 1 : 0);
    const int64_t place = of_two >= first ? of_two - first : of_two;
    const int64_t i = place <= round / 2 ? place : round + place - round / 2;
    const int64_t j = (round - i + rows_) % rows_;
    return {i, j, static_cast<size_t>(i), static_cast<size_t>(j), round, round};
  }

  // The side with fewer blocks has a task of each of them in every round.
  Task rectangular_task(int64_t t) const {
    const int64_t round = t / few_, few = t % few_, many = (round - few + rounds_) % rounds_;
    const int64_t i = rows_ <= cols_ ? few : many, j = rows_ <= cols_ ? many : few;
    const int64_t earlier = tasks_before(round, many);
    return {i,
            j,
            static_cast<size_t>(i),
            static_cast<size_t>(rows_ + j),
            rows_ <= cols_ ? round : earlier,
            rows_ <= cols_ ? earlier : round};
  }

  // Of a block of the other side: rounds before this one in which (round - block) modulo the number
  // of rounds is a block of the side with fewer.
  int64_t tasks_before(int64_t round, int64_t block) const {
    const auto up_to = [this](int64_t k) {
      return k / rounds_ * few_ + std::min(k % rounds_, few_);
    };
    return up_to(rounds_ - block + round) - up_to(rounds_ - block);
  }

  static void await(const std::atomic<int64_t>& turn, int64_t wanted,
                    const std::atomic<bool>& failed) {
    while (turn.load(std::memory_order_acquire) != wanted && !failed) std::this_thread::yield();
  }

  const int64_t rows_, cols_, rounds_, few_;
  const bool symmetric_;
};

}  // namespace flashmetric
