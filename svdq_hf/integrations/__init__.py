"""Other people's libraries, one folder each: what svdq_hf plugs into them."""
