"""Where bytes live: directories, S3 and hubs behind one protocol."""
