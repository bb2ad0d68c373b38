/* When the native library leaves torch's threads alone, with a clock and a runtime that are made up.
 * Built and run by test_native.py. Prints how many of the products went to the runtime. */

#include <stdint.h>
#include <time.h>

static int64_t clock_now, each_work = 100000, each_wait; /* nanoseconds: of a region's work, and of its end */

static int made_up_clock(clockid_t clock, struct timespec *now) {
    (void)clock; /* the same for both: only the work and the wait take time */
    now->tv_sec = clock_now / 1000000000, now->tv_nsec = clock_now % 1000000000;
    return 0;
}
#define clock_gettime made_up_clock
#include "svdq.c"
#include <stdio.h>

static int64_t regions, worked;

static void runtime(void (*work)(void *), void *what, unsigned threads, unsigned flags) {
    (void)threads, (void)flags;
    regions++;
    work(what);
    clock_now += each_wait;
}

static void work(void *what) {
    (void)what;
    worked++;
    clock_now += each_work;
}

/* How many of some regions the runtime got. */
static int64_t of(int64_t count, int64_t wait, int64_t threads) {
    int64_t before = regions;
    each_wait = wait;
    for (int64_t i = 0; i < count; i++) in_parallel(work, NULL, threads);
    return regions - before;
}

int main(void) {
    enum { LATE = 4000000 };
    int wrong = of(3, 0, 2) != 0; /* no runtime is known yet */
    svdq_use_openmp((void *)(uintptr_t)runtime);
    wrong |= of(100, 0, 2) != 100;
    wrong |= of(100, 100000, 2) != 100; /* as long as the work took: two threads halve it at best */
    wrong |= of(100, LATE, 1) != 0;
    wrong |= of(1 + 8 + 1 + 16 + 1 + 32, LATE, 2) != 3; /* twice as many alone after each late one */
    wrong |= of(1, 0, 2) != 1 || of(50, 0, 2) != 50;    /* quiet again: all of them */
    wrong |= of(1 + 8, LATE, 2) != 1;                   /* and as patient as in the beginning */
    wrong |= of(10000, LATE, 2) > 30;                   /* beside a busy process nearly all are alone */
    each_work = 10 * LATE;
    of(512, LATE, 2);
    wrong |= of(100, LATE, 2) != 100; /* large steps are worth the wait */
    wrong |= worked != 3 + 100 + 100 + 100 + 59 + 51 + 9 + 10000 + 512 + 100;
    printf("%ld\n", regions);
    return wrong;
}
