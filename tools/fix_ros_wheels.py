"""Make the CMake targets of the ROS wheels use this environment's Python and NumPy.

The wheels export the include folders of the machine on which they were built. CMake rejects these, because they do not
exist here.
"""

import re
import sys
import sysconfig
from pathlib import Path

import numpy

replacements = {
    r"/opt/python/cp3\d+-cp3\d+/include/python3\.\d+": sysconfig.get_paths()["include"],
    r"/opt/python/cp3\d+-cp3\d+/lib/python3\.\d+/site-packages/numpy/_?core/include": numpy.get_include(),
}
for path in Path(sys.prefix, "share").glob("*/cmake/*.cmake"):
    text = fixed = path.read_text()
    for pattern, folder in replacements.items():
        fixed = re.sub(pattern, folder, fixed)
    if fixed != text:
        path.write_text(fixed)
