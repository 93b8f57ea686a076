"""What compressing gradients costs a processor, beside torch's hook and the package of PowerSGD's author."""
