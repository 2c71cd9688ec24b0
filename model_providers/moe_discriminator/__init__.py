"""A discriminator: a Qwen3-VL whose MLPs are towers of experts, with a scalar head."""
