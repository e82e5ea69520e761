"""Finds the packages, which stand under three roots; setup.cfg, with all the rest, can name one."""

from setuptools import find_packages, setup

setup(
    packages=[
        *find_packages(include=["kascade_sglang*"]),
        *find_packages("kernels"),
        *find_packages("patches"),
    ]
)
