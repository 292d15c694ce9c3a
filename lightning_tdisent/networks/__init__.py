"""Networks, one file each: `Network` is the contract, `UNet` and `DiT` wrap diffusers."""
