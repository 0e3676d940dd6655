// LayerNorm (Ba et al. 2016): y = (x - mean) rstd weight + bias.
// variants: WARPS=1 PACKS=0,1,2,3,4,8
// variants: WARPS=2,4 PACKS=2,3,8
// variants: WARPS=8 PACKS=2,3,4,8
#define CENTRED 1
#include "norm.cuh"
