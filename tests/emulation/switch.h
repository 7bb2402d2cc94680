// Changing from one stack to another.
#pragma once
#include <cstddef>
#include <cstdint>

#if !defined(__x86_64__)
#include <ucontext.h>
#endif

namespace tinyllm::emulated {

#if defined(__x86_64__)

// swapcontext makes two system calls each time, for masks of signals that nobody changes here: as much time as all of
// an emulated kernel's work. So: what a function must keep goes onto the stack, and the stack changes.
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
  // Begins at entry, on a stack of so many bytes.
  void start(void* stack, size_t bytes, void (*entry)()) {
    // As if entry had been called from nowhere: 8 bytes above a multiple of 16, as after a call.
    void** const top = reinterpret_cast<void**>(static_cast<unsigned char*>(stack) + bytes) - 3;
    top[0] = nullptr;
    top[-1] = reinterpret_cast<void*>(entry);
    for (int i = 2; i <= 7; ++i) top[-i] = nullptr;
    at_ = top - 7;
  }
  // Leaves this one for another.
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
