"""Images, patches and boxes; knows nothing of transport."""
