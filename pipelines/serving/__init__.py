"""What a replica is made of: HTTP, batches, drawing, and following the champion."""
