"""The reduction on a CUDA device; `launch` and the kernels are imported only where Triton is."""
