"""The two settings setuptools has no pyproject key for: the cffi module, and a wheel for every CPython."""

from setuptools import setup

setup(
    cffi_modules=["kvmpy/abi/build_native.py:ffi"],
    options={"bdist_wheel": {"py_limited_api": "cp311"}},
)
