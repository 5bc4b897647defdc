/* Products of the step with dot products, and with AMX or SMMLA. They are as much code as all else of step.c: in a
   file of their own, they are compiled beside it (setup.py). */

#include "instructions.h"
#include "matrix.h"
#ifdef HAS_DOT
#include <immintrin.h>
#include "dots.h"
#include "products_bf16.h"
#include "products_int8.h"
#ifdef HAS_VNNI
#include "products_vnni.h"
#endif
#ifdef HAS_TILES
#include "products_tiles.h"
#endif
#endif
#ifdef HAS_ARM
#include <arm_neon.h>
#include "dots.h"
#include "products_arm.h"
#endif
