// SPDX-License-Identifier: Apache-2.0
// Uninitialised, cache-line aligned working memory of one op call.
#pragma once

#include <sys/mman.h>

#include <cstdint>
#include <cstdlib>
#include <new>
#include <utility>

namespace flashmetric {

template <class T>
class Buffer {
 public:
  Buffer() = default;
  explicit Buffer(int64_t size) : size_(size) {
    // Large pages for large buffers: a fresh 4 KB page costs more than the work done on it.
    constexpr size_t kLargePage = size_t{1} << 21;
    const size_t wanted = static_cast<size_t>(size) * sizeof(T) + 64;
    const size_t alignment = wanted >= 2 * kLargePage ? kLargePage : 64;
    const size_t bytes = (wanted + alignment - 1) / alignment * alignment;
    data_ = static_cast<T*>(std::aligned_alloc(alignment, bytes));
    if (data_ == nullptr) throw std::bad_alloc();
#if defined(MADV_HUGEPAGE)
    if (alignment == kLargePage) (void)madvise(data_, bytes, MADV_HUGEPAGE);
#endif
  }
  Buffer(int64_t size, T value) : Buffer(size) { fill(value); }
  Buffer(Buffer&& other) noexcept : data_(other.data_), size_(other.size_) {
    other.data_ = nullptr;
    other.size_ = 0;
  }
  Buffer& operator=(Buffer&& other) noexcept {
    std::swap(data_, other.data_);
    std::swap(size_, other.size_);
    return *this;
  }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  ~Buffer() { std::free(data_); }

  void fill(T value) {
    for (int64_t i = 0; i < size_; ++i) data_[i] = value;
  }
  T* data() { return data_; }
  const T* data() const { return data_; }
  int64_t size() const { return size_; }
  T& operator[](int64_t i) { return data_[i]; }
  const T& operator[](int64_t i) const { return data_[i]; }

 private:
  T* data_ = nullptr;
  int64_t size_ = 0;
};

}  // namespace flashmetric
