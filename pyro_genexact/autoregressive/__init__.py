"""The chain rule as one distribution: conditioner + distribution head."""
