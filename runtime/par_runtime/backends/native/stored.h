/* What numbers are stored in, in a bundle; as in library.py. */

#ifndef STORED_H
#define STORED_H
enum { FP32, FP16, BF16, INT8, INT4 };
#endif
