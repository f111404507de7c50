"""What runs in the container: from a mounted spec to a verified, published adapter."""

from job.libraries import leave_out_unused

leave_out_unused()  # before anything of this package imports them
