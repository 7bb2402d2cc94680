// Switching between stacks.
#pragma once
#include <cstddef>
#include <cstdint>

#if !defined(__x86_64__)
#include <ucontext.h>
#endif

namespace tinyllm::emulated {

#if defined(__x86_64__)

// swapcontext makes two system calls per switch, for signal masks that nothing changes here, which takes as long as all
// the work of an emulated kernel. This function saves the callee-saved registers on the stack and switches stacks,
// nothing else.
extern "C" void tinyllm_switch_stacks(void** from, void* to);
asm(R"(
.text
.local tinyllm_switch_stacks
.type tinyllm_switch_stacks, @function
tinyllm_switch_stacks:
  endbr64
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size tinyllm_switch_stacks, .-tinyllm_switch_stacks
)");

class Context {
 public:
  // Prepares to run `entry` on a stack of `bytes` bytes.
  void start(void* stack, size_t bytes, void (*entry)()) {
    // The stack as a call of `entry` leaves it: 8 bytes above a multiple of 16.
    void** const top = reinterpret_cast<void**>(static_cast<unsigned char*>(stack) + bytes) - 3;
    top[0] = nullptr;
    top[-1] = reinterpret_cast<void*>(entry);
    for (int i = 2; i <= 7; ++i) top[-i] = nullptr;
    at_ = top - 7;
  }
  // Switches from this context to another.
  void to(Context& other) { tinyllm_switch_stacks(&at_, other.at_); }

 private:
  void* at_ = nullptr;
};

#else

class Context {
 public:
  void start(void* stack, size_t bytes, void (*entry)()) {
    getcontext(&at_);
    at_.uc_stack.ss_sp = stack;
    at_.uc_stack.ss_size = bytes;
    at_.uc_link = nullptr;
    makecontext(&at_, entry, 0);
  }
  void to(Context& other) { swapcontext(&at_, &other.at_); }

 private:
  ucontext_t at_;
};

#endif

}  // namespace tinyllm::emulated
