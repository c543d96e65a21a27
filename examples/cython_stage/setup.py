# SPDX-License-Identifier: BSD-3-Clause
"""python setup.py build_ext --build-lib DIRECTORY"""

from pathlib import Path

from Cython.Build import cythonize
from setuptools import Extension, setup

import rtap

setup(
    name="cython-stage",
    ext_modules=cythonize(
        [Extension("cython_stage", ["cython_stage.pyx"], include_dirs=[rtap.get_include()])],
        build_dir="build",
        # Without this, importing it turns the GIL on in free-threaded Python.
        compiler_directives={"freethreading_compatible": True},
        # Cython searches sys.path, and an editable install is not on it.
        include_path=[str(Path(rtap.__file__).parents[1])],
    ),
)
