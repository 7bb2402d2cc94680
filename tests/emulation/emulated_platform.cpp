// The scheduler of emulated_platform.h, and the operations of a warp.
#include <dlfcn.h>
#include <emulated_platform.h>
#include <switch.h>
#include <sys/mman.h>

#include <cstdlib>
#include <exception>
#include <fstream>
#include <memory>
#include <utility>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#endif

namespace tinyllm::emulated {

Thread* current = nullptr;
dim3 block_dim, grid_dim;

namespace {

constexpr size_t kStackBytes = 256 * 1024;  // virtual memory, of which only the used pages are allocated

// The stack of a thread, and its state.
class Fiber {
 public:
  Fiber() {
    stack_ = mmap(nullptr, kStackBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (stack_ == MAP_FAILED) throw std::bad_alloc();
  }
  ~Fiber() { munmap(stack_, kStackBytes); }
  Fiber(const Fiber&) = delete;

  void start(void (*entry)()) {
    context.start(stack_, kStackBytes, entry);
    done = false;
  }

  Context context;
  Thread thread;
  bool done = true;
  std::function<bool()> condition;  // the condition that it waits for, if any
  void* fake_stack = nullptr;
  const void* stack() const { return stack_; }

 private:
  void* stack_;
};

std::vector<std::unique_ptr<Fiber>> fibers;  // reused by later launches
Context scheduler;
Fiber* running = nullptr;
const std::function<void()>* kernel = nullptr;
bool schedule_backward = false;
std::exception_ptr failure;  // of a thread; an exception must not unwind from one stack into another
[[maybe_unused]] const void* scheduler_stack = nullptr;
[[maybe_unused]] size_t scheduler_stack_bytes = 0;

void to_scheduler() {
  Fiber* const self = running;
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(self->done ? nullptr : &self->fake_stack, scheduler_stack, scheduler_stack_bytes);
#endif
  self->context.to(scheduler);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(self->fake_stack, &scheduler_stack, &scheduler_stack_bytes);
#endif
}

void enter() {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(nullptr, &scheduler_stack, &scheduler_stack_bytes);
#endif
  try {
    (*kernel)();
  } catch (...) {
    failure = std::current_exception();
  }
  running->done = true;
  to_scheduler();
}

// Runs a fiber until it waits or ends; returns whether it ran.
bool resume(Fiber& fiber) {
  if (fiber.done) return false;
  running = &fiber;
  current = &fiber.thread;
  if (fiber.condition) {
    if (!fiber.condition()) return false;
    fiber.condition = nullptr;
  }
#if defined(__SANITIZE_ADDRESS__)
  void* fake_stack = nullptr;
  __sanitizer_start_switch_fiber(&fake_stack, fiber.stack(), kStackBytes);
#endif
  scheduler.to(fiber.context);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(fake_stack, nullptr, nullptr);
#endif
  if (failure) std::rethrow_exception(std::exchange(failure, nullptr));
  return true;
}

void read_schedule() {
  const char* const set = std::getenv("TINYLLM_EMULATED_SCHEDULE");
  const std::string schedule = set ? set : "forward";
  if (schedule != "forward" && schedule != "backward")
    throw std::invalid_argument("TINYLLM_EMULATED_SCHEDULE is " + schedule + "; forward or backward is needed");
  schedule_backward = schedule == "backward";
}

// Appends a line for each launch to the file TINYLLM_EMULATED_LOG: the offset of the kernel in the library, threads per
// block, bytes of shared memory, blocks per cluster, and blocks along x, y and z.
void log_launch(const void* kernel, unsigned threads, size_t shared, unsigned cluster, dim3 grid) {
  const char* const path = std::getenv("TINYLLM_EMULATED_LOG");
  Dl_info info;
  if (path == nullptr || dladdr(kernel, &info) == 0) return;
  std::ofstream(path, std::ios::app) << static_cast<const char*>(kernel) - static_cast<const char*>(info.dli_fbase)
                                     << " " << threads << " " << shared << " " << cluster << " " << grid.x << " "
                                     << grid.y << " " << grid.z << "\n";
}

// Runs warp by warp, each as far as it can, until all threads have ended.
void run_to_end(const char* name, size_t count, size_t block_threads) {
  // Warps do not extend across blocks.
  std::vector<std::pair<size_t, size_t>> warps;
  for (size_t block = 0; block < count; block += block_threads)
    for (size_t lane = 0; lane < block_threads; lane += 32)
      warps.emplace_back(block + lane, block + std::min(block_threads, lane + 32));
  if (backward()) std::reverse(warps.begin(), warps.end());
  for (bool all_done = false; !all_done;) {
    bool any = false;
    all_done = true;
    for (const auto& [begin, end] : warps) {
      for (bool moved = true; moved;) {
        moved = false;
        for (size_t i = begin; i < end; ++i) moved |= resume(*fibers[backward() ? end - 1 - (i - begin) : i]);
        any |= moved;
      }
      for (size_t i = begin; i < end; ++i) all_done &= fibers[i]->done;
    }
    if (!any && !all_done) throw std::runtime_error(std::string(name) + ": its threads wait for each other forever");
  }
}

}  // namespace

bool backward() { return schedule_backward; }

void wait_for(const std::function<bool()>& condition) {
  if (condition()) return;
  running->condition = condition;
  to_scheduler();
}

void arrive(Rendezvous& rendezvous, unsigned members) {
  if (rendezvous.members != 0 && rendezvous.members != members)
    throw std::runtime_error("threads disagree about how many meet at a barrier");
  rendezvous.members = members;
  if (++rendezvous.arrived == members) {
    rendezvous.arrived = rendezvous.members = 0;
    ++rendezvous.generation;
  }
}

void arrive_and_wait(Rendezvous& rendezvous, unsigned members) {
  const uint64_t mine = rendezvous.generation;
  arrive(rendezvous, members);
  wait_for([&rendezvous, mine] { return rendezvous.generation != mine; });
}

void run_grid(const char* name, const void* function, dim3 grid, dim3 block, size_t shared, unsigned cluster,
              const std::function<void()>& body) {
  read_schedule();
  const unsigned threads = block.x * block.y * block.z;
  if (threads == 0 || threads > 1024 || grid.y > 65535 || grid.z > 65535 || shared > 227 * 1024 || cluster > 8 ||
      grid.x % cluster != 0)
    throw std::invalid_argument(std::string(name) + ": no GPU takes such a launch");
  log_launch(function, threads, shared, cluster, grid);
  while (fibers.size() < static_cast<size_t>(threads) * cluster) fibers.push_back(std::make_unique<Fiber>());
  block_dim = block;
  grid_dim = grid;
  kernel = &body;
  const size_t bytes = (std::max<size_t>(shared, 1) + 1023) / 1024 * 1024;
  for (unsigned z = 0; z < grid.z; ++z)
    for (unsigned y = 0; y < grid.y; ++y)
      for (unsigned x = 0; x < grid.x; x += cluster) {
        std::vector<Block> blocks(cluster);
        std::vector<Block*> pointers;
        // Allocated exactly, so that the address sanitizer reports accesses beyond the end.
        std::vector<std::unique_ptr<unsigned char, decltype(&std::free)>> memory;
        Rendezvous everyone;
        for (unsigned rank = 0; rank < cluster; ++rank) {
          memory.emplace_back(static_cast<unsigned char*>(std::aligned_alloc(1024, bytes)), &std::free);
          std::memset(memory[rank].get(), 0xff, bytes);  // uninitialised memory reads as NaN
          Block& b = blocks[rank];
          b.index = dim3(x + rank, y, z);
          b.rank = rank;
          b.cluster = &pointers;
          b.cluster_rendezvous = &everyone;
          b.threads = threads;
          b.shared = memory[rank].get();
          b.shared_bytes = shared;
          b.warps.resize((threads + 31) / 32);
          b.warpgroups.resize((threads + 127) / 128);
          b.named.resize(16);
          pointers.push_back(&b);
          for (unsigned t = 0; t < threads; ++t) {
            Fiber& fiber = *fibers[rank * threads + t];
            fiber.thread = Thread{};
            fiber.thread.block = &b;
            fiber.thread.index = dim3(t % block.x, t / block.x % block.y, t / block.x / block.y);
            fiber.thread.linear = t;
            fiber.condition = nullptr;
            fiber.start(&enter);
          }
        }
        run_to_end(name, static_cast<size_t>(threads) * cluster, threads);
      }
  current = nullptr;
}

}  // namespace tinyllm::emulated

namespace tinyllm::cuda {
namespace {

void execute(const std::vector<emulated::Copy>& copies) {
  for (const emulated::Copy& copy : copies)
    if (copy.from != nullptr)
      std::memcpy(copy.to, copy.from, 16);
    else
      std::memset(copy.to, 0, 16);
}

}  // namespace

void cp_async(void* shared, const void* global, bool valid) {
  if (reinterpret_cast<uintptr_t>(shared) % 16 != 0 || (valid && reinterpret_cast<uintptr_t>(global) % 16 != 0))
    throw std::runtime_error("cp_async: an address is not a multiple of 16");
  emulated::current->pending.push_back({shared, valid ? global : nullptr});
  if (emulated::backward()) {
    execute(emulated::current->pending);
    emulated::current->pending.clear();
  }
}

void cp_async_commit() {
  emulated::current->committed.push_back(std::move(emulated::current->pending));
  emulated::current->pending.clear();
}

void cp_async_wait_until(size_t left) {
  auto& committed = emulated::current->committed;
  while (committed.size() > left) {
    execute(committed.front());
    committed.erase(committed.begin());
  }
}

void ldmatrix_of(Matrices** items, bool transposed) {
  for (int i = 0; i < 4; ++i)
    for (int l = 0; l < 32; ++l) {
      uint16_t pair[2];
      for (int j = 0; j < 2; ++j) {
        const int row = transposed ? l % 4 * 2 + j : l / 4, column = transposed ? l / 4 : l % 4 * 2 + j;
        const void* const begin = items[8 * i + row]->row;
        if (reinterpret_cast<uintptr_t>(begin) % 16 != 0)
          throw std::runtime_error("ldmatrix: an address is not a multiple of 16");
        std::memcpy(&pair[j], static_cast<const uint16_t*>(begin) + column, 2);
      }
      std::memcpy(&items[l]->result[i], pair, 4);
    }
}

// Read on each call, because tests change it.
int capability(int) {
  const char* const set = std::getenv("TINYLLM_EMULATED_CAPABILITY");
  return set ? std::atoi(set) : 90;
}
int emulated_code() {
  const char* const set = std::getenv("TINYLLM_EMULATED_CODE");
  return set ? std::atoi(set) : capability(0);
}

}  // namespace tinyllm::cuda
