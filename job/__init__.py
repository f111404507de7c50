"""What runs in the container: from a mounted spec to a verified, published adapter."""

from job.libraries import import_sparingly

import_sparingly()  # before anything of this package imports one
