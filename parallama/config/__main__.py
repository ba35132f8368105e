"""Makes the tables of settings in these files anew: docs/configuration.md."""

import sys
from pathlib import Path

from parallama.config import document

for name in sys.argv[1:]:
    Path(name).write_text(document(Path(name).read_text("utf-8")), "utf-8")
