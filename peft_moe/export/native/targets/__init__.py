"""Native MoE architectures, one file each; every file of this folder is imported and registers its target."""
