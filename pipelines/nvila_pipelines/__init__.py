"""What people run: the nvila command, the steps and the pipelines that wire them."""
