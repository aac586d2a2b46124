// A test case on disk, and the main() that runs it. tests/simt/<op>.cpp includes the kernel's .cu and this header and
// defines run_case; conftest.py compiles it, writes `<name>.bin` for each tensor and `scalars.txt` for the rest, and
// reads `<name>.out`. The case is run once for each schedule seed, and every output must be the same bits each time.
#pragma once

#include <sys/mman.h>

#include <algorithm>
#include <cstdio>
#include <deque>
#include <fstream>
#include <iterator>
#include <map>
#include <set>
#include <string>
#include <vector>

#include "dropout.h"
#include "engine.h"

namespace simt {

// An array in memory of exactly its size, 256-byte aligned as cudaMalloc's, so that the address sanitizer guards its
// ends.
class Buffer {
 public:
  explicit Buffer(size_t bytes) : bytes_(bytes) {
    if (posix_memalign(&data_, 256, bytes) != 0) fail("no memory for a tensor of %zu bytes", bytes);
    std::memset(data_, kPoison, bytes);
  }
  ~Buffer() { std::free(data_); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  unsigned char* data() { return static_cast<unsigned char*>(data_); }
  size_t bytes() const { return bytes_; }

 private:
  void* data_ = nullptr;
  size_t bytes_;
};

// Address space of which only the pages that are touched become memory: for strides beyond 2^31 elements.
class AddressSpace {
 public:
  explicit AddressSpace(size_t bytes) : bytes_(bytes) {
    data_ = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (data_ == MAP_FAILED) fail("no address space of %zu bytes", bytes);
  }
  ~AddressSpace() { munmap(data_, bytes_); }
  AddressSpace(const AddressSpace&) = delete;
  AddressSpace& operator=(const AddressSpace&) = delete;
  void* data() { return data_; }

 private:
  void* data_ = nullptr;
  size_t bytes_;
};

class Case {
 public:
  explicit Case(std::string folder) : folder_(std::move(folder)) {
    std::ifstream file(folder_ + "/scalars.txt");
    std::string name;
    double value;
    while (file >> name >> value) scalars_[name] = value;
  }

  double number(const std::string& name) const {
    const auto found = scalars_.find(name);
    if (found == scalars_.end()) fail("the case has no scalar %s", name.c_str());
    return found->second;
  }
  int64_t integer(const std::string& name) const { return static_cast<int64_t>(number(name)); }
  alitok::Dropout dropout() {
    const auto threshold = static_cast<uint32_t>(integer("dropout_threshold"));
    return {threshold, static_cast<float>(number("dropout_scale")), input<int64_t>("seed")};
  }
  bool has(const std::string& name) const { return scalars_.count(name) != 0; }

  // The tensor that the test wrote; null when it wrote none. The kernel must leave it as it is.
  template <class T>
  const T* input(const std::string& name) {
    return reinterpret_cast<const T*>(load(name, true));
  }
  // A tensor that the kernel both reads and writes; an output too.
  template <class T>
  T* inout(const std::string& name) {
    return reinterpret_cast<T*>(load(name, false));
  }
  // The tensor that the test wrote, cut into `rows` equal parts that begin `stride` elements apart.
  template <class T>
  T* spread(const std::string& name, int64_t rows, int64_t stride) {
    const std::vector<char> content = read(name);
    const size_t row_bytes = content.size() / static_cast<size_t>(rows), stride_bytes = stride * sizeof(T);
    spaces_.push_back(std::make_unique<AddressSpace>(static_cast<size_t>(rows - 1) * stride_bytes + row_bytes));
    char* data = static_cast<char*>(spaces_.back()->data());
    for (int64_t row = 0; row < rows; ++row) {
      std::copy_n(content.data() + row * row_bytes, row_bytes, data + row * stride_bytes);
    }
    return reinterpret_cast<T*>(data);
  }
  // Poisoned memory that is compared between schedules and handed to the test.
  template <class T>
  T* output(const std::string& name, int64_t count) {
    outputs_.emplace_back(name, make_buffer(static_cast<size_t>(count) * sizeof(T)));
    return reinterpret_cast<T*>(outputs_.back().second->data());
  }
  // Poisoned memory that nobody looks at afterwards.
  template <class T>
  T* workspace(int64_t count) {
    workspaces_.push_back(make_buffer(static_cast<size_t>(count) * sizeof(T)));
    return reinterpret_cast<T*>(workspaces_.back()->data());
  }

  void check_inputs() {
    for (auto& [buffer, original] : inputs_) {
      if (!std::equal(original.begin(), original.end(), buffer->data())) fail("a kernel wrote to one of its inputs");
    }
  }
  void save() {
    for (auto& [name, buffer] : outputs_) {
      std::ofstream file(folder_ + "/" + name + ".out", std::ios::binary);
      file.write(reinterpret_cast<const char*>(buffer->data()), static_cast<std::streamsize>(buffer->bytes()));
    }
  }
  void check_equal(Case& other, uint64_t seed) {
    for (size_t i = 0; i < outputs_.size(); ++i) {
      if (std::memcmp(outputs_[i].second->data(), other.outputs_[i].second->data(), outputs_[i].second->bytes()) != 0) {
        fail("%s is not the same under schedules 0 and %llu", outputs_[i].first.c_str(),
             static_cast<unsigned long long>(seed));
      }
    }
  }

 private:
  static std::unique_ptr<Buffer> make_buffer(size_t bytes) { return std::make_unique<Buffer>(bytes); }

  std::vector<char> read(const std::string& name) const {
    std::ifstream file(folder_ + "/" + name + ".bin", std::ios::binary);
    if (!file) fail("the case has no tensor %s", name.c_str());
    return {std::istreambuf_iterator<char>(file), {}};
  }
  unsigned char* load(const std::string& name, bool constant) {
    if (!std::ifstream(folder_ + "/" + name + ".bin")) return nullptr;
    const std::vector<char> content = read(name);
    auto buffer = make_buffer(content.size());
    unsigned char* data = buffer->data();
    std::copy(content.begin(), content.end(), data);
    if (constant) {
      inputs_.emplace_back(std::move(buffer), std::vector<unsigned char>(content.begin(), content.end()));
    } else {
      outputs_.emplace_back(name, std::move(buffer));
    }
    return data;
  }

  std::string folder_;
  std::map<std::string, double> scalars_;
  std::deque<std::pair<std::unique_ptr<Buffer>, std::vector<unsigned char>>> inputs_;
  std::deque<std::pair<std::string, std::unique_ptr<Buffer>>> outputs_;
  std::deque<std::unique_ptr<Buffer>> workspaces_;
  std::deque<std::unique_ptr<AddressSpace>> spaces_;
};

}  // namespace simt

void run_case(simt::Case& test);

int main(int argc, char** argv) {
  if (argc != 3) {
    std::fprintf(stderr, "usage: %s CASE_FOLDER SCHEDULES\n", argv[0]);
    return 2;
  }
  simt::Case first(argv[1]);
  try {
    run_case(first);
    first.check_inputs();
    for (uint64_t seed = 1; seed < std::strtoull(argv[2], nullptr, 10); ++seed) {
      simt::engine.seed = seed;
      simt::Case again(argv[1]);
      run_case(again);
      again.check_inputs();
      first.check_equal(again, seed);
    }
  } catch (const std::exception& error) {
    std::fprintf(stderr, "simt: %s\n", error.what());
    return 4;
  }
  first.save();
  std::printf("bank_conflicts %llu\n", static_cast<unsigned long long>(simt::engine.bank_conflicts));
  return 0;
}
