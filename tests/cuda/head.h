/* head.h - how what stands in a library's place asks the emulator's stream, which begins with this, to do something:
 * run(arg), when it comes to it. */
#ifndef INTELLECT_TESTS_CUDA_HEAD_H
#define INTELLECT_TESTS_CUDA_HEAD_H

struct emulator_head {
    void (*ask)(void *stream, void (*run)(void *arg), void *arg);
};

#endif
