// Kernel calls kept as they were checked, to be made again on the same memory: a pass of a hundred calls becomes a few.
#pragma once

#include <cstddef>
#include <functional>
#include <utility>
#include <vector>

#include "cpu/kernels.h"

namespace cocoop_fast {

class Recording {
  public:
    using Call = std::function<void(const Kernels&)>;

    Recording() = default;
    Recording(const Recording&) = delete;
    Recording& operator=(const Recording&) = delete;
    ~Recording() { end(); }

    // What this thread calls between the two is added.
    void begin();
    void end();

    void add(Call call) { calls_.push_back(std::move(call)); }
    void run() const;
    size_t size() const { return calls_.size(); }

    // That this thread's calls are added to, or null.
    static Recording* current();

  private:
    std::vector<Call> calls_;
};

}  // namespace cocoop_fast
