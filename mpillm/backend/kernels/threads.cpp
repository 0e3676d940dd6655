// Number of OpenMP threads of the kernels; without OpenMP it stays 1.
#include "common.h"

namespace mpillm {
int num_threads = 1;
}

extern "C" void mpillm_set_threads(int n) {
#ifdef _OPENMP
    mpillm::num_threads = n > 1 ? n : 1;
#else
    (void)n;
#endif
}
