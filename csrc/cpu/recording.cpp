#include "cpu/recording.h"

#include <stdexcept>

#include "cpu/dispatch.h"

namespace cocoop_fast {

static thread_local Recording* current_recording = nullptr;

void Recording::begin() {
    if (current_recording != nullptr) throw std::logic_error("a recording within a recording");
    current_recording = this;
}

void Recording::end() {
    if (current_recording == this) current_recording = nullptr;
}

Recording* Recording::current() { return current_recording; }

void Recording::run() const {
    const Kernels& table = kernels();
    for (const Call& call : calls_) call(table);
}

}  // namespace cocoop_fast
