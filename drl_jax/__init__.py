"""Energy-based models learned by diffusion recovery likelihood."""
