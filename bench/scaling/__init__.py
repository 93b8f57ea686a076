"""What one gradient scale loses in a deep network and one for each residual branch keeps."""
