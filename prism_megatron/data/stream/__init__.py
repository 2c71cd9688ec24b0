"""What a run trains on, step by step: order, mixture, packs, and who reads them ahead."""
