"""Images and masks: decoding, checking, contrast and colour. Nothing here knows of networks."""
