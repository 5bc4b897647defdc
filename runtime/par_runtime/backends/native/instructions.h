/* What of a CPU's instructions the kernels of step.c and decoder.c use. */

#include <stdlib.h>
#include <string.h>

typedef struct {
    int short_vectors;      /* vectors of 16 bytes: NEON of 64-bit ARM; elsewhere only what tests ask for */
    int avx2;               /* AVX2, FMA and F16C */
    int avx512;             /* these, and AVX-512 with F, BW and VL */
    int bf16_dot, int8_dot; /* dot products of AVX-512; bf16 also needs VBMI. int8_dot of ARM: SDOT */
    int vnni;               /* dot products of bytes in AVX2 (AVX-VNNI), where there is no AVX-512 */
    int int8_matrix;        /* products of small matrices of bytes, of ARM: SMMLA */
    int bf16_matrix;        /* of bf16: BFMMLA, and BFDOT */
} Instructions;

#if defined(__GNUC__) && defined(__x86_64__)
#define HAS_VECTORS
#define HAS_AVX
#define FLOAT_REGISTER "+x" /* in the constraints of inline assembly */
#elif defined(__GNUC__) && defined(__aarch64__) && !defined(__AARCH64EB__) /* the order of bytes matters */
#define HAS_VECTORS
#define HAS_ARM
#define FLOAT_REGISTER "+w"
#endif

#ifdef HAS_AVX
#include <cpuid.h>
#if __GNUC__ >= 10 || (defined(__clang_major__) && __clang_major__ >= 9)
#define HAS_DOT /* the compiler knows dot products */
#endif
#if (defined(__clang_major__) ? __clang_major__ >= 12 : __GNUC__ >= 11) && !defined(FEWER_INSTRUCTIONS)
#define HAS_VNNI /* it knows AVX-VNNI, which an assembler without AMX lacks too */
#endif
#if defined(HAS_VNNI) && defined(__linux__)
#define HAS_TILES /* the compiler knows AMX, and the system is one that can be asked for it */
#include <stdatomic.h>
#include <sys/syscall.h>
#include <unistd.h>

/* Whether this process may use AMX. Linux wants to be asked, as it must save 8 KB more for each thread. It refuses where
   a thread has a stack for signals that is too small for that; once it has agreed, it refuses to set up such a stack.
   The first answer of this library stays: what is loaded later computes as what is loaded already. */
static inline int tiles_allowed(void) {
    enum { UNKNOWN, YES, NO };
    static atomic_int answer = UNKNOWN;
    const unsigned needed = 1u << 22 | 1u << 24 | 1u << 25; /* AMX-BF16, AMX-TILE, AMX-INT8 */
    const long ask = 0x1023, tile_data = 18;                /* ARCH_REQ_XCOMP_PERM and XFEATURE_XTILE_DATA, Linux 5.16 */
    unsigned a, b, c, d;
    if (atomic_load(&answer) == UNKNOWN) {
        int has = __get_cpuid_count(7, 0, &a, &b, &c, &d) && (d & needed) == needed;
        atomic_store(&answer, has && syscall(SYS_arch_prctl, ask, tile_data) == 0 ? YES : NO);
    }
    return atomic_load(&answer) == YES;
}
#endif
#endif

#ifdef HAS_ARM
/* Whether the compiler knows them: all the time, as Apple's does, or in functions that say so. */
#if !defined(FEWER_INSTRUCTIONS) && (defined(__clang_major__) ? __clang_major__ >= 16 : __GNUC__ >= 10)
#define HAS_SDOT
#define HAS_SMMLA
#define HAS_BFMMLA
#endif
#if defined(__ARM_FEATURE_DOTPROD) && !defined(HAS_SDOT)
#define HAS_SDOT
#endif
#if defined(__ARM_FEATURE_MATMUL_INT8) && !defined(HAS_SMMLA)
#define HAS_SMMLA
#endif
#if defined(__ARM_FEATURE_BF16_VECTOR_ARITHMETIC) && !defined(HAS_BFMMLA)
#define HAS_BFMMLA
#endif
#if defined(__linux__)
#include <sys/auxv.h>
#elif defined(__APPLE__)
#include <sys/sysctl.h>
#endif

/* Whether the system says that this CPU has an instruction: a bit of what Linux tells of it, or Apple's name. */
static inline int arm_has(unsigned long word, int bit, const char *name) {
    (void)word, (void)bit, (void)name;
#if defined(__linux__)
    return getauxval(word) >> bit & 1;
#elif defined(__APPLE__)
    int has = 0;
    size_t size = sizeof has;
    return sysctlbyname(name, &has, &size, NULL, 0) == 0 && has;
#else
    return 0;
#endif
}
#if defined(__ARM_FEATURE_DOTPROD) /* the compiler was told that every CPU has it */
#define ARM_HAS_SDOT 1
#else
#define ARM_HAS_SDOT arm_has(16, 20, "hw.optional.arm.FEAT_DotProd") /* AT_HWCAP, HWCAP_ASIMDDP */
#endif
#if defined(__ARM_FEATURE_MATMUL_INT8)
#define ARM_HAS_SMMLA 1
#else
#define ARM_HAS_SMMLA arm_has(26, 13, "hw.optional.arm.FEAT_I8MM") /* AT_HWCAP2, HWCAP2_I8MM */
#endif
#if defined(__ARM_FEATURE_BF16_VECTOR_ARITHMETIC)
#define ARM_HAS_BFMMLA 1
#else
#define ARM_HAS_BFMMLA arm_has(26, 14, "hw.optional.arm.FEAT_BF16") /* AT_HWCAP2, HWCAP2_BF16 */
#endif
#endif

/* What this CPU and its operating system can. PARVIS_NATIVE in the environment allows less: "dots" no tiles; "avx512" or
   "avx2" no dot products either; "vnni" AVX2 and AVX-VNNI; "sse" the kernels of 64-bit ARM, in vectors of 16 bytes, for
   tests: they need AVX2's fused multiply-add here, so they are for no other CPU. On ARM "dots" no SMMLA and no bf16, "neon"
   no SDOT either. */
static inline Instructions instructions_of_cpu(void) {
    Instructions have = {0};
#ifdef HAS_AVX
    const char *requested = getenv("PARVIS_NATIVE");
    unsigned a, b, c = 0, d; /* not every compiler that is used knows the name "f16c" */
    __builtin_cpu_init();
    have.avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __get_cpuid(1, &a, &b, &c, &d) &&
                (c & bit_F16C);
    if (have.avx2 && requested && !strcmp(requested, "sse")) return (Instructions){.short_vectors = 1};
    have.avx512 = have.avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                  __builtin_cpu_supports("avx512vl") &&
                  !(requested && (!strcmp(requested, "avx2") || !strcmp(requested, "vnni")));
#ifdef HAS_VNNI
    have.vnni = have.avx2 && !have.avx512 &&
                !(requested && (!strcmp(requested, "avx2") || !strcmp(requested, "avx512"))) &&
                __get_cpuid_count(7, 0, &a, &b, &c, &d) && a >= 1 && __get_cpuid_count(7, 1, &a, &b, &c, &d) &&
                (a & 1u << 4);
#endif
#ifdef HAS_DOT
    int dots = have.avx512 && !(requested && !strcmp(requested, "avx512"));
    have.bf16_dot = dots && __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vbmi");
    have.int8_dot = dots && __builtin_cpu_supports("avx512vnni");
#endif
#elif defined(HAS_VECTORS)
    have.short_vectors = 1; /* every 64-bit ARM has NEON */
#ifdef HAS_ARM
    const char *requested = getenv("PARVIS_NATIVE");
    int plain = requested && !strcmp(requested, "neon"), dots = requested && !strcmp(requested, "dots");
    (void)plain, (void)dots;
#ifdef HAS_SDOT
    have.int8_dot = !plain && ARM_HAS_SDOT;
#endif
#ifdef HAS_SMMLA
    have.int8_matrix = !plain && !dots && ARM_HAS_SMMLA;
#endif
#ifdef HAS_BFMMLA
    have.bf16_matrix = !plain && !dots && ARM_HAS_BFMMLA;
#endif
#endif
#endif
    return have;
}

/* Whether products may be made in tiles too, with AMX, in bf16 and int8; only where both dot products are. Linux is
   asked for it: what takes no tiles should not call this. */
static inline int tiles_of_cpu(Instructions have) {
#ifdef HAS_TILES
    const char *requested = getenv("PARVIS_NATIVE");
    return have.bf16_dot && have.int8_dot && !(requested && !strcmp(requested, "dots")) && tiles_allowed();
#else
    (void)have;
    return 0;
#endif
}
