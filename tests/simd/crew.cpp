// Crew against simulated machines, whose clock is a number: no time passes here.
#include <cmath>
#include <cstdio>
#include <functional>

#include "threads.h"

namespace {

using Mode = alitok::Crew::Mode;

constexpr int kStepsPerCall = 16;

// How long a step together takes that begins at `now`.
using Machine = std::function<double(double now)>;

// The helper's core belongs to another process for `away` of every `period` seconds; the leader waits.
Machine busy(double together, double away, double period) {
  return [=](double now) {
    const double phase = std::fmod(now, period);
    return phase < away ? away - phase + together : together;
  };
}

struct Run {
  alitok::Crew& crew;
  alitok::Crew::Work work{1, 2, 3};
  double alone;  // time of a step on one thread
  double now = 0;
  int steps = 0, together = 0;

  void until(double end, const Machine& machine, const Machine& part = [](double) { return 0.0; }) {
    while (now < end) {
      const Mode began = crew.next(work);
      Mode mode = began;
      for (int i = 0; i < kStepsPerCall; ++i, ++steps) {
        const double seconds = mode == Mode::together ? machine(now) : alone;
        now += seconds;
        if (mode == Mode::together) {
          ++together;
          crew.after_together(work, seconds);
        } else {
          crew.after_alone(work, seconds);
        }
        if (mode != Mode::alone) mode = crew.next(work);
      }
      if (began != Mode::alone) {  // the one that is waited for may be away then, too
        const double seconds = part(now);
        now += seconds;
        crew.after_parting(work, seconds);
      }
    }
  }
  // Time taken, in units of what one thread would have taken.
  double against_one() const { return now / (steps * alone); }
};

int failures = 0;
void expect(bool condition, const char* what, double value) {
  if (!condition) std::printf("%s: %g\n", what, value), ++failures;
}

}  // namespace

int main() {
  for (const double alone : {0.0003, 0.002, 0.01, 0.08}) {  // from the demo to XL
    const double together = 0.55 * alone;
    const Machine idle = [=](double) { return together; };
    {
      alitok::Crew crew;
      Run run{crew, {1, 2, 3}, alone};
      run.until(20, idle);
      expect(run.steps - run.together <= 3 + run.steps / 128, "idle: steps alone", run.steps - run.together);
    }
    {  // another process for 4 ms twice a second: worth it all the same
      alitok::Crew crew;
      Run run{crew, {1, 2, 3}, alone};
      run.until(20, busy(together, 0.004, 0.5));
      expect(run.against_one() < 0.62, "4 ms twice a second: time against one thread", run.against_one());
    }
    for (const double slice : {0.003, 0.012, 0.05}) {  // the last one as a container's quota does it
      alitok::Crew crew;
      Run run{crew, {1, 2, 3}, alone};
      run.until(40, busy(together, 0.7 * slice, slice), busy(0, 0.7 * slice, slice));
      if (!(run.against_one() < 1.1)) std::printf("steps of %g s, slices of %g s, ", alone, slice);
      expect(run.against_one() < 1.1, "busy: time against one thread", run.against_one());
      Run after{crew, run.work, alone};
      after.until(5, idle);
      Run later{crew, run.work, alone};
      later.until(10, idle);
      const int others = later.steps - later.together;
      expect(others <= 1 + later.steps / 128, "idle again: steps alone", others);
    }
  }
  {  // what was measured while one thread was slow, too, does not keep the others for long
    const double alone = 0.0023;
    alitok::Crew crew;
    Run slow{crew, {1, 2, 3}, 3 * alone};
    slow.until(5, busy(2 * alone, 0, 1));
    Run run{crew, slow.work, alone};
    run.until(20, busy(1.6 * alone, 0, 1));
    expect(run.against_one() < 1.1, "slow, then busy: time against one thread", run.against_one());
  }
  {  // works are told apart, and more of them than there is room for
    alitok::Crew crew;
    const alitok::Crew::Work first{1}, second{2};
    crew.after_alone(first, 0.01);
    for (int i = 0; i < 10; ++i) crew.after_together(first, 0.03);
    expect(crew.next(first) == Mode::alone, "a work that loses: together", 1);
    expect(crew.next(second) == Mode::together, "another one: alone", 1);
    for (int64_t i = 3; i < 100; ++i) expect(crew.next({i}) == Mode::together, "one of many: alone", 1);
  }
  return failures != 0;
}
