#include "threads.h"

#include <algorithm>
#include <cmath>
#include <fstream>
#include <sstream>
#include <thread>

#if defined(__linux__)
#include <sched.h>
#endif

namespace alitok {
namespace {

constexpr double kNone = 0;

double smaller(double a, double b) { return a == kNone ? b : b == kNone ? a : std::min(a, b); }

std::string first_line(const std::string& file) {
  std::ifstream stream(file);
  std::string line;
  std::getline(stream, line);
  return line;
}

// "max 100000" or "50000 100000": microseconds of CPU time in each period.
double quota_v2(const std::string& folder) {
  std::istringstream words(first_line(folder + "/cpu.max"));
  double quota = 0, period = 0;
  return words >> quota >> period && quota > 0 && period > 0 ? quota / period : kNone;
}

double quota_v1(const std::string& folder) {
  std::istringstream first(first_line(folder + "/cpu.cfs_quota_us")), second(first_line(folder + "/cpu.cfs_period_us"));
  double quota = 0, period = 0;
  return first >> quota && second >> period && quota > 0 && period > 0 ? quota / period : kNone;
}

// The smallest of a group and those above it. In a container its path may be the host's: what is not there has no limit.
double smallest(double (*quota)(const std::string&), const std::string& mount, std::string group) {
  double least = quota(mount);
  while (group.size() > 1) {
    least = smaller(least, quota(mount + group));
    group.resize(group.rfind('/') == std::string::npos ? 0 : group.rfind('/'));
  }
  return least;
}

}  // namespace

double cpu_quota(const std::string& root) {
  std::ifstream groups(root + "/proc/self/cgroup");
  double least = kNone;
  for (std::string line; std::getline(groups, line);) {  // "0::/group" or "4:cpu,cpuacct:/group"
    const size_t a = line.find(':'), b = a == std::string::npos ? a : line.find(':', a + 1);
    if (b == std::string::npos) continue;
    std::string controllers = line.substr(a, b - a + 1);  // with the colons around them
    std::replace(controllers.begin(), controllers.end(), ':', ',');
    const std::string group = line.substr(b + 1);
    const std::string mount = root + "/sys/fs/cgroup";
    if (controllers == ",,") least = smaller(least, smallest(quota_v2, mount, group));
    if (controllers.find(",cpu,") != std::string::npos) {
      least = smaller(least, smallest(quota_v1, mount + "/cpu", group));
    }
  }
  return least;
}

int usable_cpus() {
  static const int usable = [] {
    int cpus = static_cast<int>(std::max(1u, std::thread::hardware_concurrency()));
#if defined(__linux__)
    cpu_set_t set;
    CPU_ZERO(&set);
    if (sched_getaffinity(0, sizeof(set), &set) == 0) cpus = std::max(1, CPU_COUNT(&set));
#endif
    const double quota = cpu_quota("");
    return quota == kNone ? cpus : std::min(cpus, std::max(1, static_cast<int>(std::ceil(quota))));
  }();
  return usable;
}

Crew::Record& Crew::find(const Work& work) {
  for (Record& record : records_) {
    if (record.work == work) return record;
  }
  Record& record = records_[next_++ % records_.size()];
  record = {};
  record.work = work;
  return record;
}

Crew::Mode Crew::next(const Work& work) {
  const std::lock_guard<std::mutex> lock(mutex_);
  const Record& record = find(work);
  if (record.pause > 0) return Mode::alone;
  return record.since >= (record.measured < kFirstProbes ? 1 : kProbe) ? Mode::probe : Mode::together;
}

void Crew::after_together(const Work& work, double seconds) {
  const std::lock_guard<std::mutex> lock(mutex_);
  Record& record = find(work);
  ++record.since;
  owe(record, seconds - record.alone);
}

void Crew::after_parting(const Work& work, double seconds) {
  const std::lock_guard<std::mutex> lock(mutex_);
  owe(find(work), seconds);
}

void Crew::owe(Record& record, double seconds) {
  if (record.alone <= 0) return;
  const double credit = std::max(kCredit, 2 * record.alone);
  record.debt = std::max(record.debt + seconds, -credit);
  if (record.debt <= -credit / 2) record.failures = 0;
  if (record.debt <= std::max(kDebt, record.alone / 10)) return;
  const double pause = kPause * record.debt;
  record.pause = std::max(record.pause, 0.0) + std::max(pause, std::min(pause * (1 << record.failures), kLongPause));
  record.failures = std::min(record.failures + 1, kMostFailures);
  record.debt = 0;
}

// The least of the first ones. Then quickly down, since nothing makes a step faster than it is, and slowly up, since much
// makes it slower: what was measured while the machine was busy is soon forgotten.
void Crew::after_alone(const Work& work, double seconds) {
  const std::lock_guard<std::mutex> lock(mutex_);
  Record& record = find(work);
  if (record.measured < kFirstProbes) {
    record.alone = record.measured++ == 0 ? seconds : std::min(record.alone, seconds);
  } else if (seconds < record.alone) {
    record.alone = (record.alone + seconds) / 2;
  } else {
    record.alone += (std::min(seconds, 2 * record.alone) - record.alone) / 8;
  }
  record.since = 0;
  record.pause -= seconds;
}

Crew& process_crew() {
  static Crew crew;
  return crew;
}

}  // namespace alitok
