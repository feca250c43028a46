"""What a build will take, before anything is spent."""
