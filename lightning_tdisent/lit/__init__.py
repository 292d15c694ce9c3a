"""Training with Lightning: modules, data module, callbacks, checkpoints. The only package that imports Lightning."""

import lightning
from packaging.version import Version

from lightning_tdisent.errors import InputError

# older versions run code hidden in a checkpoint (CVE-2026-58659); setup.cfg cannot prevent that one is installed
if Version(lightning.__version__) < Version("2.6.6"):
    raise InputError(
        f"lightning {lightning.__version__} is installed, 2.6.6 or later is required: earlier versions run code hidden "
        "in a checkpoint, and the uploads 2.6.2 and 2.6.3 stole credentials. pip install 'lightning>=2.6.6,<2.7'"
    )
