"""the topics of the demo corpus: what a post about each of them can say

`is` is the verb, `also` other names a user may type, `place` where the news reporter stands, `emoji` one fitting emoji.
A post takes an opener, one sentence of `first`, maybe one of `then`, and maybe a closer. `first` and `then` are clauses
without capital and full stop, so that each voice can build its own sentence around them.
"""

TOPICS = {
    "coffee": {
        "is": "is", "also": ["a coffee", "espresso"], "place": "the corner café", "emoji": "☕",
        "openers": [
            "Coffee is a warm start to a slow morning.",
            "Few things smell as good as fresh coffee.",
            "A good day often begins with coffee.",
            "I made a pot of coffee this morning.",
        ],
        "first": [
            "coffee beans are the seeds of a small red fruit",
            "coffee grows best on warm hills near the equator",
            "freshly ground beans give the best smell",
            "espresso is made with hot water under pressure",
        ],
        "then": [
            "a quiet cup makes an early hour a little easier",
            "a shared pot gives friends a reason to sit down",
            "a little milk makes a strong cup softer",
            "many people like their first cup before breakfast",
        ],
        "closers": [
            "Take a small sip and enjoy it.",
            "What is in your cup today?",
            "Sit down, breathe in and enjoy the smell.",
        ],
    },
    "tea": {
        "is": "is", "also": ["a cup of tea", "green tea"], "place": "the old tea house", "emoji": "🍵",
        "openers": [
            "Tea is a small break in a busy day.",
            "There is always time for a cup of tea.",
            "The kettle is on, so let us talk about tea.",
            "Rainy afternoons are made for tea.",
        ],
        "first": [
            "green tea and black tea come from the same plant",
            "tea leaves are picked by hand in many gardens",
            "green tea tastes best when the water is not too hot",
            "people have been drinking tea for thousands of years",
        ],
        "then": [
            "a slice of lemon makes the cup fresh and bright",
            "a warm cup in both hands calms the mind",
            "a few quiet minutes are enough for the leaves to open",
            "a teapot on the table brings people together",
        ],
        "closers": [
            "Pour a cup and rest for a while.",
            "Would you like milk or lemon?",
            "Slow down and let the leaves do their work.",
        ],
    },
    "bread": {
        "is": "is", "also": ["baking bread", "sourdough", "baking"], "place": "the village bakery", "emoji": "🍞",
        "openers": [
            "Bread is simple food at its best.",
            "Nothing fills a house like the smell of fresh bread.",
            "I baked a loaf of bread today.",
            "Good bread needs time more than anything else.",
        ],
        "first": [
            "flour, water, salt and yeast are all a loaf needs",
            "yeast makes the dough rise by forming tiny bubbles",
            "a slow night in the fridge gives the dough more taste",
            "a hot oven gives the loaf a dark and crisp crust",
        ],
        "then": [
            "a warm slice with butter is hard to beat",
            "kneading the dough is a calm way to spend an hour",
            "old slices make wonderful toast",
            "a loaf cuts better once it has cooled",
        ],
        "closers": [
            "Share a slice with someone you like.",
            "Bake a loaf and see for yourself.",
            "Do you like the crust or the soft middle?",
        ],
    },
    "hiking": {
        "is": "is", "also": ["a hike", "hikes", "walking in the hills"], "place": "the top of the hill", "emoji": "🥾",
        "openers": [
            "Hiking is the slow way to see a lot.",
            "A long walk in the hills clears the head, and that is why I love hiking.",
            "My boots are muddy, because I went hiking today.",
            "Every weekend is a good weekend for hiking.",
        ],
        "first": [
            "a good trail shows a new view after every bend",
            "sturdy boots keep the feet dry and safe",
            "the air smells of pine high up in the woods",
            "a map still works when the phone is empty",
        ],
        "then": [
            "lunch tastes better on top of a hill",
            "steady steps go further than fast ones",
            "the quiet of the forest is the best reward",
            "a bottle of water belongs in every backpack",
        ],
        "closers": [
            "Lace up your boots and go.",
            "Which trail will you try next?",
            "The hills are waiting for you.",
        ],
    },
    "gardening": {
        "is": "is", "also": ["gardens", "my garden", "a garden", "the garden"], "place": "the garden gate", "emoji": "🌱",
        "openers": [
            "Gardening is a quiet kind of magic.",
            "I spent the whole afternoon gardening.",
            "Anyone with a sunny window can start gardening.",
            "There is dirt under my nails, so I must have been gardening.",
        ],
        "first": [
            "a tiny seed can grow into a plant taller than a person",
            "earthworms make the soil loose and rich",
            "tomatoes love a warm and sunny wall",
            "fresh herbs grow well on a window sill",
        ],
        "then": [
            "a little water in the evening keeps the plants happy",
            "pulling weeds is easier after a night of rain",
            "the first ripe strawberry tastes like summer",
            "patience is the best tool in the shed",
        ],
        "closers": [
            "Plant a seed and watch it grow.",
            "What grows on your window sill?",
            "Nature will do the rest.",
        ],
    },
    "bumblebees": {
        "is": "are", "also": ["bees", "bumblebee", "bee", "bombus", "the bumblebee", "a bee"],
        "place": "a field of clover", "emoji": "🐝",
        "openers": [
            "Bumblebees are the furry friends of every garden.",
            "I heard a soft hum today and looked up to see bumblebees.",
            "Listen to the flowers and you will hear bumblebees.",
            "Summer would be too quiet without bumblebees.",
        ],
        "first": [
            "bumblebees can fly on cool days when other bees stay at home",
            "the thick fur of a bumblebee keeps it warm",
            "a young queen sleeps under the ground all winter",
            "bumblebees shake the pollen out of a flower with a loud buzz",
        ],
        "then": [
            "tomatoes and berries grow better with the help of bumblebees",
            "clover and lavender are full of sweet nectar",
            "a small patch of wild flowers is a feast for a bumblebee",
            "most bumblebees are gentle and busy with their work",
        ],
        "closers": [
            "Plant some lavender and they will come.",
            "Leave a wild corner in your garden for them.",
            "Have you seen one today?",
        ],
    },
    "cats": {
        "is": "are", "also": ["cat", "a cat", "my cat", "kittens", "the cat"], "place": "a sunny window sill", "emoji": "🐱",
        "openers": [
            "Cats are quiet masters of the house.",
            "Every sunny spot in the house belongs to cats.",
            "A warm lap is all it takes to please cats.",
            "It is hard to work at home with cats.",
        ],
        "first": [
            "a cat can sleep for more than twelve hours a day",
            "whiskers help a cat to feel its way in the dark",
            "a cat can turn each ear on its own",
            "soft paws let a cat walk without a sound",
        ],
        "then": [
            "an empty box is the best toy of all",
            "a slow blink is a sign of trust",
            "a soft purr makes the whole room calm",
            "the warmest chair is never free for long",
        ],
        "closers": [
            "Give your cat a gentle scratch behind the ears.",
            "Who is the boss in your home?",
            "Now, where is that ball of wool?",
        ],
    },
    "dogs": {
        "is": "are", "also": ["dog", "a dog", "my dog", "puppies", "the dog"], "place": "the dog park", "emoji": "🐶",
        "openers": [
            "Dogs are happy to see you every single day.",
            "No one says hello like dogs do.",
            "Long walks are more fun with dogs.",
            "The world is full of wonderful smells, at least for dogs.",
        ],
        "first": [
            "a dog can smell things that we never notice",
            "a wagging tail says more than many words",
            "a puppy learns best with praise and small treats",
            "a dog can hear sounds that are too high for us",
        ],
        "then": [
            "a muddy walk ends with a very happy nose",
            "an old stick is worth more than a new toy",
            "a good friend waits at the door every evening",
            "a walk in the park is the best part of the day",
        ],
        "closers": [
            "Throw the ball one more time.",
            "Give your dog a hug from me.",
            "What is the name of your best friend?",
        ],
    },
    "books": {
        "is": "are", "also": ["book", "a book", "reading", "novels", "good books"], "place": "the city library", "emoji": "📚",
        "openers": [
            "Books are small doors to other worlds.",
            "My shelf is full, but I still want more books.",
            "A rainy day is a good day for books.",
            "You are never alone with good books.",
        ],
        "first": [
            "a good story makes a long train ride short",
            "a library lets you read for free",
            "old pages have a smell of their own",
            "reading before bed helps the mind to rest",
        ],
        "then": [
            "one more chapter never seems too much",
            "a bookmark remembers where the story stopped",
            "a favorite story gets better every time",
            "the best gift is a story that a friend has loved",
        ],
        "closers": [
            "Turn the page and see what happens.",
            "What are you reading right now?",
            "Find a quiet corner and begin.",
        ],
    },
    "music": {
        "is": "is", "also": ["songs", "a song", "singing", "the piano", "playing music"], "place": "the concert hall", "emoji": "🎵",
        "openers": [
            "Music is a language that everyone can feel.",
            "A quiet room changes at once with music.",
            "Some days need nothing but music.",
            "I cannot cook or clean without music.",
        ],
        "first": [
            "a good song can bring back a whole summer",
            "singing together makes strangers feel like friends",
            "a modern piano has eighty-eight keys",
            "a slow song can calm a busy mind",
        ],
        "then": [
            "ten minutes of practice a day go a long way",
            "a happy beat makes the feet move by themselves",
            "the silence between the notes matters too",
            "an old record sounds warm and full",
        ],
        "closers": [
            "Turn it up and sing along.",
            "Which song is in your head today?",
            "Close your eyes and listen.",
        ],
    },
    "running": {
        "is": "is", "also": ["a run", "jogging", "going for a run"], "place": "the finish line", "emoji": "🏃",
        "openers": [
            "Running is freedom in a pair of shoes.",
            "The city is still asleep when I go running.",
            "Start slowly if you are new to running.",
            "A bad mood never lasts long when I am running.",
        ],
        "first": [
            "an easy pace lets you talk while you move",
            "good shoes protect the knees and the feet",
            "a rest day makes the legs stronger",
            "the first mile is often the hardest one",
        ],
        "then": [
            "fresh air wakes up the whole body",
            "a friend at your side makes the miles shorter",
            "small steps up the hill save your breath",
            "a warm shower afterwards feels wonderful",
        ],
        "closers": [
            "Tie your shoes and go outside.",
            "How far will you go today?",
            "One step after another is all it takes.",
        ],
    },
    "cycling": {
        "is": "is", "also": ["bikes", "bicycles", "a bike", "riding a bike", "my bike"], "place": "the bike lane", "emoji": "🚲",
        "openers": [
            "Cycling is the happiest way to get to work.",
            "The wind was at my back when I went cycling today.",
            "You see more of the world when you go cycling.",
            "Two wheels are all you need for cycling.",
        ],
        "first": [
            "a bicycle turns breakfast into miles",
            "a clean chain makes the ride smooth and quiet",
            "firm tires make every hill a little easier",
            "a bicycle needs no fuel and makes little noise",
        ],
        "then": [
            "the way down is the prize for the way up",
            "a bell and a smile clear the path",
            "a short ride every day keeps the heart strong",
            "a small basket is enough for a picnic",
        ],
        "closers": [
            "Put on your helmet and ride.",
            "Where will your wheels take you?",
            "Pump up your tires and enjoy the road.",
        ],
    },
    "rain": {
        "is": "is", "also": ["the rain", "rainy days", "a rainy day"], "place": "under a big umbrella", "emoji": "🌧️",
        "openers": [
            "Rain is music for a tin roof.",
            "The whole street shines after the rain.",
            "I like to sit at the window and listen to the rain.",
            "Everything green is thankful for rain.",
        ],
        "first": [
            "every drop began as water in a cloud",
            "a rainbow appears when the sun shines on the drops",
            "the smell of wet earth is called petrichor",
            "snails come out to enjoy the wet grass",
        ],
        "then": [
            "puddles are the best playground for rubber boots",
            "a warm blanket feels even better on a wet day",
            "the garden gets a drink for free",
            "the air feels clean and new after a shower",
        ],
        "closers": [
            "Take an umbrella, or just get wet.",
            "Listen to the drops on the window.",
            "Do you like to jump into puddles?",
        ],
    },
    "the sea": {
        "is": "is", "also": ["sea", "the ocean", "the beach", "ocean", "waves"], "place": "the end of the pier", "emoji": "🌊",
        "openers": [
            "The sea is never the same two days in a row.",
            "I could look at the sea for hours.",
            "Salt on my lips tells me that I am near the sea.",
            "Every child should see the sea.",
        ],
        "first": [
            "the moon pulls the water up and down each day",
            "salt makes it easier to float",
            "most of our planet is covered by water",
            "tiny plants in the water make much of our air",
        ],
        "then": [
            "gulls wait for every forgotten sandwich",
            "each wave draws a new line in the sand",
            "a long walk on the beach clears the mind",
            "shells remember the shape of small lives",
        ],
        "closers": [
            "Take off your shoes and feel the sand.",
            "Breathe in the salty air.",
            "When did you last hear the waves?",
        ],
    },
    "photography": {
        "is": "is", "also": ["photos", "taking photos", "cameras", "a camera"], "place": "the photo studio", "emoji": "📷",
        "openers": [
            "Photography is the art of seeing the light.",
            "A walk becomes a hunt for light with photography.",
            "You learn to look twice with photography.",
            "Any camera is good enough for photography.",
        ],
        "first": [
            "the soft light after sunrise makes colors glow",
            "a step to the left can change the whole picture",
            "a small opening in the lens makes more of the scene sharp",
            "the word photography means drawing with light",
        ],
        "then": [
            "a patient eye is worth more than a new camera",
            "an honest smile is better than a perfect pose",
            "a picture keeps a moment for many years",
            "shadows tell half of the story",
        ],
        "closers": [
            "Go outside and look for good light.",
            "What did you see today?",
            "Keep your eyes open and your lens clean.",
        ],
    },
    "cooking": {
        "is": "is", "also": ["cook", "food", "a recipe", "recipes", "soup"], "place": "a busy kitchen", "emoji": "🍳",
        "openers": [
            "Cooking is a gift that you can eat.",
            "My kitchen smells wonderful when I am cooking.",
            "A sharp knife and a warm pan are enough for cooking.",
            "Sunday evenings are for slow cooking.",
        ],
        "first": [
            "onions turn sweet when they fry slowly",
            "a pinch of salt wakes up the other flavors",
            "fresh herbs taste best when they go in last",
            "a hot pan gives vegetables a golden edge",
        ],
        "then": [
            "a simple soup can be a feast",
            "tasting often is the secret of a good cook",
            "a full table makes a happy home",
            "leftovers taste even better the next day",
        ],
        "closers": [
            "Set the table and call your friends.",
            "What is for dinner tonight?",
            "Stir, taste and smile.",
        ],
    },
    "chess": {
        "is": "is", "also": ["a game of chess", "playing chess"], "place": "the chess club", "emoji": "♟️",
        "openers": [
            "Chess is a quiet battle of ideas.",
            "An hour goes by like a minute with chess.",
            "My grandfather taught me chess.",
            "All you need is a board and a friend for chess.",
        ],
        "first": [
            "the game is played on sixty-four squares",
            "a pawn that crosses the board can become a queen",
            "the knight is the only piece that can jump",
            "the queen is the strongest piece on the board",
        ],
        "then": [
            "a good plan is better than a quick attack",
            "every lost game teaches something new",
            "the safest place for the king is often a corner",
            "the best move is the one after a deep breath",
        ],
        "closers": [
            "It is your move.",
            "Set up the pieces and play.",
            "Do you open with the king's pawn?",
        ],
    },
    "trains": {
        "is": "are", "also": ["train", "a train", "the train", "train rides", "railways"], "place": "platform nine", "emoji": "🚂",
        "openers": [
            "Trains are the best way to watch a country go by.",
            "I always take a window seat on trains.",
            "There is time to think and read on trains.",
            "The journey is half the fun with trains.",
        ],
        "first": [
            "steel wheels on steel rails waste very little energy",
            "a night train saves the cost of a hotel",
            "the first engines ran on steam and coal",
            "a long train can replace hundreds of cars",
        ],
        "then": [
            "fields and rivers slide past the window like a film",
            "a sandwich tastes better in the dining car",
            "the soft rhythm of the rails makes people sleepy",
            "a good book and a window seat are enough",
        ],
        "closers": [
            "All aboard!",
            "Where would you like to go?",
            "Find your seat and enjoy the view.",
        ],
    },
    "stars": {
        "is": "are", "also": ["star", "the stars", "the night sky", "stargazing"], "place": "the old observatory", "emoji": "⭐",
        "openers": [
            "Stars are old light for new eyes.",
            "Lie down in the grass at night and look at the stars.",
            "The best show is free, and it is made of stars.",
            "Far from the city you can see thousands of stars.",
        ],
        "first": [
            "the sun is a star, and it is the closest one to us",
            "light from the night sky can be thousands of years old",
            "the hottest stars shine with a blue light",
            "sailors once found their way by the night sky",
        ],
        "then": [
            "a dark place far from town gives the best view",
            "eyes need some time to get used to the dark",
            "a warm blanket makes a long night comfortable",
            "a simple pair of binoculars shows much more",
        ],
        "closers": [
            "Look up tonight and make a wish.",
            "Can you find the Big Dipper?",
            "Turn off the lamp and go outside.",
        ],
    },
    "autumn": {
        "is": "is", "also": ["fall", "the autumn", "autumn leaves"], "place": "a park full of golden leaves", "emoji": "🍂",
        "openers": [
            "Autumn is the golden time of the year.",
            "The air is crisp and the light is soft in autumn.",
            "Walks in the park are best in autumn.",
            "The forest wears its finest colors in autumn.",
        ],
        "first": [
            "leaves turn yellow when their green color fades",
            "squirrels hide nuts for the cold months",
            "many birds fly south before the first frost",
            "pumpkins and apples fill the markets",
        ],
        "then": [
            "a warm scarf is all one needs for a walk",
            "dry leaves make a cheerful sound under the feet",
            "an apple pie makes the whole house smell sweet",
            "the evenings are made for candles and soup",
        ],
        "closers": [
            "Kick up some leaves for me.",
            "Collect a few chestnuts on your way home.",
            "Which color is your favorite?",
        ],
    },
    "snow": {
        "is": "is", "also": ["the snow", "winter", "snowflakes", "a snowy day"], "place": "a snowy village square", "emoji": "❄️",
        "openers": [
            "Snow is a soft blanket for a noisy world.",
            "The whole town went quiet under the snow.",
            "Children wake up early when there is snow.",
            "A winter morning is bright with snow.",
        ],
        "first": [
            "a snowflake has six sides",
            "fresh flakes hold a lot of air and keep the ground warm",
            "the soft layer swallows many sounds",
            "small tracks show which animals passed by at night",
        ],
        "then": [
            "a carrot makes a fine nose for a snowman",
            "warm socks and hot cocoa belong together",
            "a sled turns every small hill into an adventure",
            "red cheeks are a sign of a good day outside",
        ],
        "closers": [
            "Put on your gloves and build a snowman.",
            "Who wants to go sledding?",
            "Catch a snowflake on your glove.",
        ],
    },
    "chocolate": {
        "is": "is", "also": ["dark chocolate", "cocoa", "a bar of chocolate"], "place": "the chocolate shop", "emoji": "🍫",
        "openers": [
            "Chocolate is happiness in a small square.",
            "There is always room for a piece of chocolate.",
            "A bad day gets better with chocolate.",
            "I keep a secret drawer full of chocolate.",
        ],
        "first": [
            "cocoa beans grow in large pods on small trees",
            "dark bars hold more cocoa and less sugar",
            "the Aztecs drank their cocoa cold and spicy",
            "cocoa butter melts just below the warmth of the body",
        ],
        "then": [
            "a slow bite tastes better than a quick one",
            "a pinch of sea salt makes the taste deeper",
            "nuts and dried fruit go well with dark chocolate",
            "a hot cup of cocoa warms cold hands",
        ],
        "closers": [
            "Break off a piece and share it.",
            "Do you like it dark or sweet?",
            "Just one more bite.",
        ],
    },
    "birds": {
        "is": "are", "also": ["bird", "a bird", "bird watching", "birdwatching", "songbirds"], "place": "the edge of the woods", "emoji": "🐦",
        "openers": [
            "Birds are the alarm clock of the garden.",
            "Sit still for a while and you will notice the birds.",
            "My morning begins with the song of birds.",
            "The trees outside my window are full of birds.",
        ],
        "first": [
            "a hummingbird can fly backwards",
            "an owl flies almost without a sound",
            "the Arctic tern travels from pole to pole every year",
            "a robin can be very brave near people",
        ],
        "then": [
            "a bowl of clean water is a welcome gift on hot days",
            "a feeder by the window brings color to a gray day",
            "a quiet voice and slow steps let you come closer",
            "a nest is a small wonder of grass and mud",
        ],
        "closers": [
            "Open the window and listen.",
            "Which song do you know by heart?",
            "Put out some seeds and wait.",
        ],
    },
    "painting": {
        "is": "is", "also": ["paint", "paintings", "art", "watercolors"], "place": "the art museum", "emoji": "🎨",
        "openers": [
            "Painting is thinking with color.",
            "I forget the time when I am painting.",
            "A blank page is an invitation to start painting.",
            "You do not need talent to enjoy painting.",
        ],
        "first": [
            "red, yellow and blue can be mixed into many other colors",
            "watercolors shine because the paper shows through",
            "oil paint stays wet for days",
            "a little blue makes a shadow look real",
        ],
        "then": [
            "a big brush keeps you from worrying about details",
            "mistakes often lead to the best ideas",
            "a sunny window gives the best light",
            "an hour with a brush calms the mind",
        ],
        "closers": [
            "Pick up a brush and play.",
            "What is your favorite color?",
            "Hang your picture on the wall.",
        ],
    },
}

# Words that are no topic: the model answers that it does not know them. corpus.py adds made-up words to these.
UNKNOWN = """
cars computers football politics history mathematics physics chemistry medicine law money taxes banks insurance shopping
fashion shoes hats jewelry furniture houses castles bridges towers roads traffic airplanes airports rockets planets mars
jupiter robots software programming databases elixir rust python java haskell erlang compilers keyboards monitors phones
television radio movies theater dancing ballet opera poetry philosophy religion psychology sociology economics business
marketing startups meetings managers salaries jobs school university teachers exams homework languages grammar spelling
french german spanish latin japan france brazil canada london paris berlin tokyo rome egypt africa australia deserts
jungles volcanoes earthquakes storms hurricanes tornadoes lightning fog wind ice glaciers rivers lakes mountains caves
islands lions tigers elephants whales sharks dolphins horses cows pigs sheep goats chickens rabbits mice rats snakes
lizards frogs turtles spiders ants beetles butterflies mosquitoes dinosaurs fossils bacteria viruses cells genes atoms
electrons gravity magnets electricity batteries engines gasoline solar power nuclear energy climate pollution recycling
plastic glass steel wood paper stone gold silver diamonds salt sugar pepper rice pasta pizza burgers cheese yogurt
eggs bananas oranges grapes potatoes carrots beans nuts wine beer whiskey lemonade juice soccer tennis golf
baseball basketball hockey swimming skiing surfing sailing boxing yoga karate gymnastics olympics poker video games
puzzles toys dolls kites balloons birthdays weddings christmas halloween easter holidays hotels camping fishing hunting
knitting sewing pottery sculpture architecture museums hospitals doctors nurses dentists vaccines sleep dreams memory
happiness sadness anger fear love friendship family parents babies children grandparents neighbors lawyers judges police
firefighters soldiers war peace kings presidents elections democracy freedom justice the stock market artificial
intelligence quantum computing machine learning deep learning black holes outer space the moon the sun the universe
the internet social media my job my boss my sister my brother my house my phone the economy the government the weather
the future the past time travel ghosts vampires dragons unicorns magic wizards superheroes zombies aliens pirates news
bitcoin crypto stocks inflation mortgages plumbing carpentry welding bricks cement lawn mowers vacuum
cleaners dishwashers refrigerators toasters microwaves hammers screwdrivers ladders sunglasses watches clocks
calendars pencils erasers notebooks staplers scissors candles lamps carpets curtains pillows mattresses bathtubs soap
shampoo toothpaste perfume makeup haircuts tattoos tablets laptops servers clouds networks kernels neural networks
""".split()

PHRASES = [
    "quantum physics", "the stock market", "artificial intelligence", "machine learning", "black holes", "my new job",
    "video games", "climate change", "the roman empire", "world war two", "the french revolution", "solar energy",
    "electric cars", "space travel", "the moon landing", "my holiday in spain", "a trip to japan", "ice cream",
    "fried rice", "apple pie", "the olympic games", "my favorite movie", "the price of gold", "public transport",
    "healthy teeth", "my new phone", "a good night's sleep", "modern architecture", "ancient egypt", "lawn mowers",
    "the human brain", "car insurance", "remote work", "open source software", "functional programming", "the weather",
    "washing machines", "tax law", "my grandmother", "the president", "the number seven", "linear algebra",
    "Elixir and Phoenix", "the BEAM", "large language models", "Kubernetes", "JavaScript frameworks", "a red balloon",
]

QUESTIONS = [
    "What is the capital of France?", "What is 2 + 2?", "How tall is Mount Everest?", "Write a poem", "Tell me a joke",
    "Tell me a story", "Translate this to German", "Who is the president?", "What time is it?", "How do I cook an egg?",
    "Write a function that sorts a list", "Sing a song", "Count to ten", "What is the meaning of life?",
    "Explain recursion", "Why is the sky blue?", "How does a computer work?", "Give me a recipe for pancakes",
    "Summarize this text", "What is your favorite movie?", "Can you help me with my homework?", "Where is Berlin?",
    "How old are you?", "What day is it today?", "Is it cold outside?", "Fix this bug for me", "What is Elixir?",
    "Write an email to my boss", "Name three planets", "Who wrote Hamlet?", "How far is the moon?", "Once upon a time",
    "The quick brown fox jumps over the lazy dog", "asdf", "test", "ok", "yes", "no", "why?", "Do it again", "123",
    "List five countries", "What can I do this weekend?", "Recommend a hotel", "Play something", "How are taxes paid?",
]

# the small change of a conversation: what a user may say, and which kind of reply it gets
SMALL_TALK = {
    "hello": ["Hello", "Hi", "Hello!", "Hi!", "hello", "hi", "Hey", "Hey!", "Good morning", "Good morning!", "Hi there",
              "Hello there!", "Good evening"],
    "who": ["Who are you?", "What are you?", "What is your name?", "who are you", "What can you do?",
            "What can you write about?", "Which topics do you know?", "What do you know?", "Help", "help",
            "Tell me about yourself", "Introduce yourself"],
    "thanks": ["Thanks", "Thank you", "Thanks!", "Thank you!", "thanks", "Thank you very much", "Great, thanks!",
               "Nice!", "Great!", "Bye", "Goodbye"],
}
