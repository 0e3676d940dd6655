// RMSNorm (Zhang & Sennrich 2019): y = x rstd weight.
// variants: WARPS=1 PACKS=0,1,2,3,4,8
// variants: WARPS=2,4 PACKS=2,3,8
// variants: WARPS=8 PACKS=2,3,4,8
#define CENTRED 0
#include "norm.cuh"
