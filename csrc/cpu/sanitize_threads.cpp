// torch's parallel_for once more, for ThreadSanitizer alone: the sanitizer does not see how torch's own pool, which is not
// built with it, starts work and waits for it, and would call all of that a race. Here a thread is started for each share
// of the range and joined, which it does see. Found before torch's by the linker (-Bsymbolic-functions).
#include <torch/csrc/stable/c/shim.h>

#include <algorithm>
#include <exception>
#include <thread>
#include <vector>

namespace {
thread_local bool within = false;  // a share of a range: what is nested in it runs on its thread
}

AOTITorchError torch_parallel_for(int64_t begin, int64_t end, int64_t grain_size, ParallelFunc func, void* ctx) {
  uint32_t most = 1;
  torch_get_num_threads(&most);
  const int64_t size = end - begin, grain = std::max<int64_t>(grain_size, 1);
  const int64_t count = within ? 1 : std::min<int64_t>(most, (size + grain - 1) / grain);
  std::vector<std::exception_ptr> thrown(std::max<int64_t>(count, 1));
  const auto run = [&](int64_t share, int64_t first, int64_t last) {
    try {
      func(first, last, ctx);
    } catch (...) {
      thrown[share] = std::current_exception();
    }
  };
  if (size > 0 && count == 1) run(0, begin, end);
  std::vector<std::thread> threads;
  for (int64_t share = 0; count > 1 && share < count; ++share) {
    threads.emplace_back([=, &run] {
      within = true;
      run(share, begin + size * share / count, begin + size * (share + 1) / count);
    });
  }
  for (std::thread& thread : threads) thread.join();
  return std::any_of(thrown.begin(), thrown.end(), [](const auto& e) { return e != nullptr; }) ? AOTI_TORCH_FAILURE
                                                                                               : AOTI_TORCH_SUCCESS;
}
