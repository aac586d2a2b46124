// How many threads are worth it: what the process may use, and whether the others are in time just now.
// Torch-free, and compiled once for the baseline of the architecture.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <mutex>
#include <string>

namespace alitok {

// CPUs that the control groups of this process leave it, 0 where they set no limit: the smallest quota of version 1 or 2
// from its group up to the root. `root` is where /proc and /sys are found: "" but in tests.
double cpu_quota(const std::string& root);

// The most threads that can run at once: the smaller of this process's CPU affinity and its quota, rounded up. Of when
// the library was loaded.
int usable_cpus();

// Whether a kernel whose threads meet many times in a step should use all of them or one.
//
// Threads that meet wait for the last one. Where another process has its core for a few milliseconds, that is much longer
// than the work: two threads beside one busy process are slower than one. So steps are timed. What steps together have
// lost against steps alone is a debt, gains pay it back, and when it grows beyond a short time the steps that follow are
// done alone, for kPause times as long as what was lost. Then it is tried again; after each trial that fails half as
// often, since changing over has costs that no step shows. So threads cost at most one part in kPause over one, whatever
// else runs; and where cores are free, all steps are together but for one in kProbe, which measures what a step alone
// takes. Both ways give the same result to the last bit: the clock decides about time and nothing else.
class Crew {
 public:
  // What the time of a step depends on.
  using Work = std::array<int64_t, 8>;

  enum class Mode {
    together,
    probe,  // alone, just for this step
    alone,
  };

  // How to do the next step.
  Mode next(const Work& work);

  // What the last one took.
  void after_together(const Work& work, double seconds);
  void after_alone(const Work& work, double seconds);
  // After the last step of a call together: what it took until all threads had left.
  void after_parting(const Work& work, double seconds);

 private:
  static constexpr double kPause = 20, kLongPause = 2;    // seconds, unless more was lost
  static constexpr double kDebt = 2e-3, kCredit = 20e-3;  // seconds: a scheduler's slice is some 3 ms
  static constexpr int kProbe = 128, kFirstProbes = 3, kMostFailures = 4;

  struct Record {
    Work work{};
    double alone = 0;  // time of a step; 0: not known
    int measured = 0;  // steps that it comes from, up to kFirstProbes
    int since = 0;     // steps together since the last of them
    double debt = 0;   // seconds lost together; negative: gained
    double pause = 0;  // seconds to go on alone
    int failures = 0;  // trials since steps together were last worth it
  };
  Record& find(const Work& work);
  static void owe(Record& record, double seconds);

  std::mutex mutex_;
  std::array<Record, 16> records_{};
  size_t next_ = 0;
};

// That of this process: its threads compete for the same cores.
Crew& process_crew();

}  // namespace alitok
