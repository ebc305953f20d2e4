"""Making a data set better than it was found: captions written anew, and captions made worse to learn what that costs."""
