"""The low-bit operations as Triton kernels: one operation a file, kernel and launcher together.

Importing one of the modules imports Triton; importing this package, or `dynfed_lightning._ops_triton`, does not. Every kernel
returns the bits of `dynfed_lightning._reference`, but for sums and sigmoids, which are within stated bounds. So Triton may not
fuse, reorder or approximate: kernels are launched with ``enable_fp_fusion=False``, divide with ``tl.div_rn`` (sigmoids with
``/``), and say ``tl.fma`` where the specification has a fused multiply-add. No kernel is autotuned: every machine runs the same
one, and the capture of a CUDA graph never meets a benchmark.
"""
