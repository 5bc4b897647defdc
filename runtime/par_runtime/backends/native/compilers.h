/* What is said to a compiler by name. */

#define INLINE static inline __attribute__((always_inline))

/* In front of each loop over sums: only where all of them are unrolled does the compiler keep the sums in registers. */
#ifdef __clang__ /* it takes the other one for a count; up to version 16 the sums then stay in memory */
#define UNROLL _Pragma("clang loop unroll(full)")
#else
#define UNROLL _Pragma("GCC unroll 16")
#endif
