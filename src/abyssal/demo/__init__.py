"""The main job, shown on real data: `abyssal demo`."""
