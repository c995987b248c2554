// What is made once: the first who needs it makes it, and no lock is held meanwhile; who needs the
// same waits for it, and nobody else does. A failure is thrown to the one who made it and not
// remembered: the next tries again.
#pragma once
#include <atomic>
#include <condition_variable>
#include <mutex>

namespace jaxfp8::driver {

class Once {
 public:
  template <class Make>
  void run(Make make) {
    if (state_.load(std::memory_order_acquire) == kMade) return;
    {
      std::unique_lock lock(mutex_);
      changed_.wait(lock, [this] { return state_ != kBeingMade; });
      if (state_ == kMade) return;
      state_ = kBeingMade;
    }
    try {
      make();
    } catch (...) {
      become(kNew);
      throw;
    }
    become(kMade);
  }

 private:
  enum State { kNew, kBeingMade, kMade };

  void become(State state) {
    std::lock_guard lock(mutex_);
    state_.store(state, std::memory_order_release);
    changed_.notify_all();
  }

  std::atomic<State> state_{kNew};
  std::mutex mutex_;
  std::condition_variable changed_;
};

}  // namespace jaxfp8::driver
