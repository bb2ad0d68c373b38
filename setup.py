"""The native library, built where there is a C compiler; without one the package installs all the same."""

from setuptools import Extension, setup

NATIVE = Extension(
    "svdq_hf.kernels.native.library._svdq",
    sources=["svdq_hf/kernels/native/svdq.c"],
    extra_compile_args=["-O3", "-std=gnu11", "-fvisibility=hidden"],
    optional=True,
)

setup(ext_modules=[NATIVE])
