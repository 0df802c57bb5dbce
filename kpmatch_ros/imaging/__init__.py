"""Images and masks: decoding, checking, contrast and colour. Does not depend on the networks."""
