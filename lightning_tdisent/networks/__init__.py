"""Networks, one file each: `Network` is the base class, `UNet` and `DiT` wrap diffusers."""
