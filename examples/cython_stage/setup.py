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
        # Else importing it switches the GIL on where it is off.
        compiler_directives={"freethreading_compatible": True},
        # An editable install is not on sys.path, where Cython looks.
        include_path=[str(Path(rtap.__file__).parents[1])],
    ),
)
